"""The `foveal` command: one file a subcommand. Each parses, calls and prints; torch loads only when a command runs."""
