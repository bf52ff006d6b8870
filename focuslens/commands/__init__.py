"""The work behind each ``focuslens`` command."""
