"""From a tuned student to the files that a device runs, each proven to still be the student."""
