"""study=stability"""
