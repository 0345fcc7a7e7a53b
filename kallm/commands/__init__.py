"""The program's commands, by what they look after: stored results, clusters."""
