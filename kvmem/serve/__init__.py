"""An OpenAI-compatible HTTP server for one model and one store; see `kvmem.serve.app.create_app`."""
