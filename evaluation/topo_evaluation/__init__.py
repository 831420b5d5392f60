"""Measure topology adapters: on texts, beside the dense model and baselines that need no training.

texts, embedded: what is read, by which model. baselines: sparse attention without training. measures: numbers of one
text at one length. tasks: all of them for one adapter. depths: at every target of its dial, and at one depth for all
heads. report: tables and pictures of what tasks found. bench: seconds, dense beside sparse. demo: the whole method on a
small model. training: what both trainings from a shell share. results: the schema of what is measured.
"""
