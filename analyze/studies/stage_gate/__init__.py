"""study=stage_gate"""
