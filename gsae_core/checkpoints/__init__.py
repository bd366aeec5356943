"""SAEs as files: ours and other libraries', on a disk and on the Hub."""
