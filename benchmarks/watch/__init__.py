"""A real Prometheus watches a real service: dashboards have data, rules say what happened, alerts fire and resolve."""
