"""Tables of numbers, {row: {column: number or text}}, as Markdown and as pictures."""


def markdown(head, rows):
    """The lines of a table. The first row has all columns; a later one may lack some."""
    columns = list(next(iter(rows.values())))
    yield f"| {' | '.join([head, *columns])} |"
    yield "| --- |" + " --- |" * len(columns)
    for name, row in rows.items():
        yield f"| {' | '.join([str(name), *(row.get(column, '') for column in columns)])} |"


def draw(path, tables, style="o-"):
    """Writes a .png with a panel for each of `tables`, {title: table of tokens per second, or of seconds if the title
    says so}: the rows from left to right, a curve for each column. What is not measured but a limit or a prediction is
    dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(10, 4.5 * len(tables)), 4.5), layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    for axis, (title, rows) in zip(axes, tables.items(), strict=True):
        for column in next(iter(rows.values())):
            points = {str(name): row[column] for name, row in rows.items() if column in row}
            dashed = column == "limits" or "predicted" in column
            axis.plot(list(points), list(points.values()), "--" if dashed else style, label=column)
        axis.set(title=title, ylabel="seconds" if "seconds" in title else "tokens/s", yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:g}".strip("0.") in ("2", "5") else "")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
