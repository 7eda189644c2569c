"""study=steering"""
