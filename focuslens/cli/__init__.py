"""The ``focuslens`` command, one module per subcommand; :mod:`focuslens.cli.main` lists them."""
