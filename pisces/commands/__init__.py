"""What the commands of `pisces` do; `pisces.cli` and `pisces.cli_videos` hold their options and help."""
