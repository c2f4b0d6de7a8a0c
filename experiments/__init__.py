"""Runs on real data: data sets, the command line, plots, reports and files. Every side effect lives here."""
