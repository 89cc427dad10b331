"""Runs read back from their folders, as pages, tables and figures."""
