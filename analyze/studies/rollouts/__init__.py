"""study=rollouts"""
