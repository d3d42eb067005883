"""How fast and how right a file is on this machine: cases, runtimes, clocks, sensors, results."""
