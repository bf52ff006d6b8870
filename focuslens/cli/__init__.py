"""The ``focuslens`` command, with one module per subcommand. :mod:`focuslens.cli.main` lists the subcommands."""
