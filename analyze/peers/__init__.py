"""What other projects read of a run, and other people's SAEs as runs of ours."""
