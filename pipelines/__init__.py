"""How it runs: Ray Data, Ray Train, Ray Serve, MLflow, FastAPI and storage live here, and only here."""
