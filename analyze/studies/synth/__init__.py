"""study=synth"""
