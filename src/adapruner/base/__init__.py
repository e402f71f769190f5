"""What every room may use: errors, files, processes, progress, tables, the terminal."""
