"""What `dualtoken convert` does: a file a direction, each with a report of what became of every weight."""
