"""Where the model runs: in this process or on a vLLM server."""
