"""What the verbs of the command line do. Each module takes plain values, prints nothing but its result, and is imported
only when its verb is called."""
