"""Background processes: how one starts, waits for its turn, reports and stops."""
