"""What a step costs: time, memory, bytes, and how far off the planner is."""
