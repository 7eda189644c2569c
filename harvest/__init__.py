"""Stage one: text through a language model into an activation store."""

import data as data  # before torch: it says how OpenMP threads wait
