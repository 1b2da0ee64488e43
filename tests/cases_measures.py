"""Cases of the theorems on measures of sparsity; the names as in ``cases_approximation``."""

CASES = {}
RANDOM = {}
EXTREMAL = {}
OUTSIDE = []
