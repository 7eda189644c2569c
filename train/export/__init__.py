"""SAEs in the files of other libraries, and theirs as ours."""
