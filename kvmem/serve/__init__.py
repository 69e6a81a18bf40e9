"""An OpenAI-compatible HTTP server over one model and one store: see `kvmem.serve.app.create_app`."""
