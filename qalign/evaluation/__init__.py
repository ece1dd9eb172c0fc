"""What is measured: leakage, correspondence, comparisons of methods, and the plots of them."""
