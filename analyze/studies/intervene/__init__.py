"""study=intervene"""
