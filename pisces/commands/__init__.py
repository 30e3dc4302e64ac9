"""What the commands of `pisces` do; `pisces.cli` holds their options and help."""
