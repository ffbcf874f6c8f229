"""What can be typed behind `dualtoken`, by group; the work itself is done elsewhere."""
