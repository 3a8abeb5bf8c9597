"""The model, its mathematics and the demo world. Never imports ray, mlflow or fastapi; importing it does nothing."""

__version__ = "0.1.0"
