"""study=sweep"""
