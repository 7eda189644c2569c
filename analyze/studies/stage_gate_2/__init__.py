"""study=stage_gate_2"""
