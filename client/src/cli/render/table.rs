//! Columns that line up.

use super::paint;

/// Text of a cell, and how to paint it once it is padded.
pub(in crate::cli) struct Cell {
    text: String,
    paint: fn(String) -> String,
}

impl Cell {
    pub(in crate::cli) fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), paint: |text| text }
    }

    pub(in crate::cli) fn address(value: u64) -> Self {
        Self { text: super::hex(value), paint: paint::address }
    }

    pub(in crate::cli) fn good(text: impl Into<String>) -> Self {
        Self { text: text.into(), paint: paint::good }
    }

    pub(in crate::cli) fn warning(text: impl Into<String>) -> Self {
        Self { text: text.into(), paint: paint::warning }
    }

    pub(in crate::cli) fn bad(text: impl Into<String>) -> Self {
        Self { text: text.into(), paint: paint::bad }
    }

    pub(in crate::cli) fn dim(text: impl Into<String>) -> Self {
        Self { text: text.into(), paint: paint::dim }
    }

    fn heading(text: &str) -> Self {
        Self { text: text.into(), paint: paint::heading }
    }

    fn width(&self) -> usize {
        self.text.chars().count()
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::new(text)
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::new(text)
    }
}

/// Rows of cells, each column as wide as its widest cell.
#[derive(Default)]
pub(in crate::cli) struct Table {
    indent: usize,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    pub(in crate::cli) fn new(headings: &[&str]) -> Self {
        let rows = if headings.is_empty() {
            Vec::new()
        } else {
            vec![headings.iter().map(|text| Cell::heading(text)).collect()]
        };
        Self { indent: 0, rows }
    }

    pub(in crate::cli) fn indented(self, indent: usize) -> Self {
        Self { indent, ..self }
    }

    pub(in crate::cli) fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The lines, without a newline at the end.
    pub(in crate::cli) fn render(self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns)
            .map(|column| {
                self.rows.iter().filter_map(|row| row.get(column)).map(Cell::width).max().unwrap_or(0)
            })
            .collect();
        let mut lines = Vec::new();
        for row in self.rows {
            let last = row.len().saturating_sub(1);
            let mut line = " ".repeat(self.indent);
            for (column, (cell, width)) in row.into_iter().zip(&widths).enumerate() {
                let padding = if column == last { 0 } else { width - cell.width() + 2 };
                // Paint around nothing would keep the line's tail from being trimmed.
                if !cell.text.is_empty() {
                    line += &(cell.paint)(cell.text);
                }
                line += &" ".repeat(padding);
            }
            lines.push(line.trim_end().to_owned());
        }
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_have_no_tail() {
        let mut table = Table::new(&["A", "LONG", "C", ""]).indented(1);
        table.row(["wide cell".into(), "b".into(), "c".into()]);
        table.row(["x".into(), "".into()]);
        table.row(["y".into(), "b".into(), "c".into(), Cell::dim("")]);
        let text = anstream::adapter::strip_str(&table.render()).to_string();
        assert_eq!(text, " A          LONG  C\n wide cell  b     c\n x\n y          b     c");
    }
}
