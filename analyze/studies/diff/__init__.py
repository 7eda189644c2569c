"""study=diff"""
