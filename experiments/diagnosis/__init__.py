"""What is measured about an unroll itself: exponents, bifurcations."""
