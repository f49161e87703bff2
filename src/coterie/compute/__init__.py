"""What a request costs: training, scoring and observing on a frozen base."""
