//! What is printed: each number beside its peer and its goal.

use serde::Serialize;

use crate::stats::Samples;

/// One number, its peer in the same run, and whether it reaches its goal.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The bench.
    pub bench: &'static str,
    /// What was measured.
    pub what: String,
    /// Unit of both numbers.
    pub unit: &'static str,
    /// lazyimg's median.
    pub ours: f64,
    /// Least and greatest of the runs.
    pub range: (f64, f64),
    /// How many runs.
    pub runs: usize,
    /// What it is compared with, and its median.
    pub peer: Option<Peer>,
    /// `ours / peer`.
    pub ratio: Option<f64>,
    /// What was hoped for.
    pub goal: Option<Goal>,
    /// Anything that helps to understand it.
    pub note: String,
}

/// What a number is compared with.
#[derive(Debug, Clone, Serialize)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// Its median, in the row's unit.
    pub value: f64,
}

/// What a number should be.
#[derive(Debug, Clone, Serialize)]
pub struct Goal {
    /// In words.
    pub text: String,
    /// Whether this run reached it.
    pub met: bool,
}

impl Row {
    /// A number without peer and goal.
    pub fn new(
        bench: &'static str,
        what: impl Into<String>,
        unit: &'static str,
        ours: &Samples,
    ) -> Self {
        Self {
            bench,
            what: what.into(),
            unit,
            ours: ours.median(),
            range: ours.range(),
            runs: ours.len(),
            peer: None,
            ratio: None,
            goal: None,
            note: String::new(),
        }
    }

    /// Adds the peer.
    pub fn peer(mut self, name: impl Into<String>, samples: &Samples) -> Self {
        let value = samples.median();
        self.ratio = Some(self.ours / value);
        self.peer = Some(Peer {
            name: name.into(),
            value,
        });
        self
    }

    /// The goal: `ours` is at most `limit`.
    pub fn at_most(mut self, limit: f64, why: &str) -> Self {
        let text = format!("≤ {} {}{why}", number(limit), self.unit);
        self.goal = Some(Goal {
            text,
            met: self.ours <= limit,
        });
        self
    }

    /// The goal: the ratio to the peer is at most `limit`.
    pub fn ratio_at_most(mut self, limit: f64) -> Self {
        let met = self.ratio.is_some_and(|r| r <= limit);
        self.goal = Some(Goal {
            text: format!("ratio ≤ {limit}"),
            met,
        });
        self
    }

    /// The goal: the ratio to the peer is at least `limit`.
    pub fn ratio_at_least(mut self, limit: f64) -> Self {
        let met = self.ratio.is_some_and(|r| r >= limit);
        self.goal = Some(Goal {
            text: format!("ratio ≥ {limit}"),
            met,
        });
        self
    }

    /// Adds words.
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }

    fn verdict(&self) -> &'static str {
        match &self.goal {
            Some(g) if g.met => "met",
            Some(_) => "MISSED",
            None => "",
        }
    }

    fn cells(&self) -> Vec<String> {
        let value = format!("{} {}", number(self.ours), self.unit);
        let range = match self.runs {
            1 => "one run".to_owned(),
            n => format!(
                "{}–{}, {n} runs",
                number(self.range.0),
                number(self.range.1)
            ),
        };
        let peer = self
            .peer
            .as_ref()
            .map(|p| format!("{} {} {}", p.name, number(p.value), self.unit))
            .unwrap_or_default();
        let goal = self
            .goal
            .as_ref()
            .map(|g| g.text.clone())
            .unwrap_or_default();
        vec![
            self.what.clone(),
            value,
            range,
            peer,
            self.ratio.map(|r| format!("{r:.2}")).unwrap_or_default(),
            goal,
            self.verdict().to_owned(),
            self.note.clone(),
        ]
    }
}

/// A table of another shape.
#[derive(Debug, Clone, Serialize)]
pub struct Table {
    /// The bench.
    pub bench: &'static str,
    /// Its heading.
    pub title: String,
    /// Names of columns.
    pub columns: Vec<String>,
    /// Its lines.
    pub rows: Vec<Vec<String>>,
}

/// Everything that one run found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// The machine, the date, the sizes of the workloads.
    pub facts: Vec<String>,
    /// Numbers with peers.
    pub rows: Vec<Row>,
    /// Other tables.
    pub tables: Vec<Table>,
}

const COLUMNS: [&str; 8] = [
    "what",
    "lazyimg, median",
    "range",
    "peer, median",
    "ratio",
    "goal",
    "verdict",
    "note",
];

impl Report {
    /// Takes what one bench found.
    pub fn extend(&mut self, other: Report) {
        self.facts.extend(other.facts);
        self.rows.extend(other.rows);
        self.tables.extend(other.tables);
    }

    /// All tables: rows by bench, then the others.
    fn all_tables(&self) -> Vec<Table> {
        let mut out: Vec<Table> = Vec::new();
        for row in &self.rows {
            if out.last().is_none_or(|t| t.bench != row.bench) {
                let columns = COLUMNS.map(str::to_owned).to_vec();
                let title = row.bench.to_owned();
                out.push(Table {
                    bench: row.bench,
                    title,
                    columns,
                    rows: Vec::new(),
                });
            }
            if let Some(table) = out.last_mut() {
                table.rows.push(row.cells());
            }
        }
        out.extend(self.tables.iter().cloned());
        out
    }

    /// For a terminal.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for fact in &self.facts {
            out += &format!("{fact}\n");
        }
        for table in self.all_tables() {
            out += &format!("\n{}\n", table.title);
            let lines: Vec<&Vec<String>> =
                std::iter::once(&table.columns).chain(&table.rows).collect();
            let width = |c: usize| {
                lines
                    .iter()
                    .filter_map(|l| l.get(c))
                    .map(|s| s.chars().count())
                    .max()
                    .unwrap_or(0)
            };
            let widths: Vec<usize> = (0..table.columns.len()).map(width).collect();
            for line in lines {
                let cells = line.iter().zip(&widths).map(|(s, w)| format!("{s:<w$}"));
                out += "  ";
                out += cells.collect::<Vec<_>>().join("  ").trim_end();
                out += "\n";
            }
        }
        out
    }

    /// For `docs/benchmarks.md`.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        for fact in &self.facts {
            out += &format!("* {fact}\n");
        }
        for table in self.all_tables() {
            let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
            out += &format!("\n### {}\n\n{}", table.title, line(&table.columns));
            out += &format!("|{}\n", "---|".repeat(table.columns.len()));
            table.rows.iter().for_each(|r| out += &line(r));
        }
        out
    }
}

/// Three significant digits.
pub fn number(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(v: f64) -> Samples {
        Samples::from_iter([v])
    }

    #[test]
    fn a_missed_goal_is_said_so() {
        let row = Row::new("b", "w", "ms", &one(200.0)).at_most(150.0, "");
        assert_eq!(row.verdict(), "MISSED");
        let row = Row::new("b", "w", "s", &one(1.0))
            .peer("p", &one(2.0))
            .ratio_at_most(0.6);
        assert_eq!((row.verdict(), row.ratio), ("met", Some(0.5)));
    }

    #[test]
    fn the_text_has_a_line_for_each_row_and_the_peer_in_it() {
        let mut report = Report::default();
        report
            .rows
            .push(Row::new("b", "w", "s", &one(1.0)).peer("ext4", &one(2.0)));
        assert!(report.text().contains("ext4 2.00 s"), "{}", report.text());
        assert!(report.markdown().contains("| ext4 2.00 s |"));
    }
}
