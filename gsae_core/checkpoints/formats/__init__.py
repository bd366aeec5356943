"""SAEs in other libraries' files: recognised, read as ours, and written for them."""
