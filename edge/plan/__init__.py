"""What to run where: link, profiles, options, and the choice among them. Pure; time comes in as an argument."""
