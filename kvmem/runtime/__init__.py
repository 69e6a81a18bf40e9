"""The thread that runs the model, and the streams it feeds."""
