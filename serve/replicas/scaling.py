"""How many replicas a model gets: as many as its requests need, so many for each.

Ray Serve asks every replica how many requests it has, for they do not come through Ray.
"""

from typing import Any

from ray.serve.config import AutoscalingContext


def by_requests(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """An autoscaling policy; Ray Serve keeps to its own delays and bounds besides."""
    requests = (context.aggregated_metrics or {}).get("requests", {})
    if not requests:  # nothing was told yet
        return context.target_num_replicas, {}
    return sum(requests.values()) / context.config.get_target_ongoing_requests(), {}
