"""The ``focuslens`` command, with one module for each subcommand; :mod:`focuslens.cli.main` lists them."""
