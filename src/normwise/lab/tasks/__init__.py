"""What can be learned: each kind of task is a module with a problem, its options and metrics."""
