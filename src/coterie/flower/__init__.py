"""Everything that touches Flower: the only folder that imports flwr, ray and starlette."""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # flwr reads it when it is imported
