class CppExport:
    def __call__(self, cell): pass
