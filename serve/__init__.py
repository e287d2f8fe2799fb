"""Serving: `serve.engine.Engine` in plain torch, and around it an OpenAI API on Ray Serve (`serve.app`)."""
