//! The report: rows of figures, each with a peer's or a limit's figure from the same run, and the bars that they are held against.

use serde::Serialize;

/// What a figure is set beside.
#[derive(Debug, Clone, Serialize)]
pub struct Beside {
    /// Who or what.
    pub name: String,
    /// Its figure.
    pub value: f64,
    /// Its unit.
    pub unit: &'static str,
}

/// One figure.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// What was measured, `group/case/quantity`.
    pub name: String,
    /// The figure.
    pub value: f64,
    /// Its unit.
    pub unit: &'static str,
    /// A peer's or the physical limit's figure from the same run, if there is one.
    pub peer_or_limit: Option<Beside>,
    /// KVM flavour: figures of different ones are not comparable.
    pub kvm_backend: String,
    /// What one should know beside.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// A goal, held against the figure of this run.
#[derive(Debug, Clone, Serialize)]
pub struct Bar {
    /// What is wanted, as a sentence.
    pub bar: String,
    /// The figure wanted.
    pub wanted: String,
    /// The figure reached, or why there is none.
    pub got: String,
    /// Whether it was reached; `None` if it could not be measured.
    pub reached: Option<bool>,
}

/// All rows of a run.
#[derive(Debug)]
pub struct Report {
    /// In the order in which they were measured.
    pub rows: Vec<Row>,
    kvm_backend: String,
}

impl Report {
    /// An empty one.
    pub fn new(kvm_backend: String) -> Self {
        Self { rows: Vec::new(), kvm_backend }
    }

    /// KVM flavour of this run.
    pub fn kvm_backend(&self) -> &str {
        &self.kvm_backend
    }

    /// Add a figure that stands for itself.
    pub fn alone(&mut self, name: impl Into<String>, value: f64, unit: &'static str) -> &mut Row {
        self.add(name, value, unit, None)
    }

    /// Add a figure beside another one in the same unit.
    pub fn beside(
        &mut self,
        name: impl Into<String>,
        value: f64,
        unit: &'static str,
        peer: impl Into<String>,
        its: f64,
    ) -> &mut Row {
        self.add(name, value, unit, Some(Beside { name: peer.into(), value: its, unit }))
    }

    fn add(
        &mut self,
        name: impl Into<String>,
        value: f64,
        unit: &'static str,
        peer_or_limit: Option<Beside>,
    ) -> &mut Row {
        let kvm_backend = self.kvm_backend.clone();
        let at = self.rows.len();
        self.rows.push(Row { name: name.into(), value, unit, peer_or_limit, kvm_backend, note: None });
        &mut self.rows[at]
    }

    /// The figure of a row, if it was measured.
    pub fn value(&self, name: &str) -> Option<f64> {
        self.rows.iter().find(|r| r.name == name).map(|r| r.value)
    }

    /// The rows whose names do not begin with `except`, for people.
    pub fn table(&self, except: &str) -> String {
        let rows = || self.rows.iter().filter(|r| !r.name.starts_with(except));
        let width = rows().map(|r| r.name.len()).max().unwrap_or(0);
        let mut text = String::new();
        for row in rows() {
            let beside = row.peer_or_limit.as_ref().map_or_else(String::new, |b| {
                let ratio = if b.value == 0.0 { String::new() } else { format!(" ({:.2} of it)", row.value / b.value) };
                format!("   {}: {} {}{ratio}", b.name, number(b.value), b.unit)
            });
            let note = row.note.as_ref().map_or_else(String::new, |n| format!("   [{n}]"));
            text.push_str(&format!("  {:<width$} {:>11} {:<9}{beside}{note}\n", row.name, number(row.value), row.unit));
        }
        text
    }
}

/// Three or four significant figures.
pub fn number(value: f64) -> String {
    match value.abs() {
        v if v == 0.0 || v >= 1000.0 => format!("{value:.0}"),
        v if v >= 100.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

/// The bars for people.
pub fn bars_table(bars: &[Bar]) -> String {
    let width = bars.iter().map(|b| b.bar.chars().count()).max().unwrap_or(0);
    let wanted = bars.iter().map(|b| b.wanted.chars().count()).max().unwrap_or(0);
    bars.iter()
        .map(|b| {
            let verdict = match b.reached {
                Some(true) => "reached",
                Some(false) => "NOT reached",
                None => "not measured",
            };
            format!("  {:<width$}  {:<wanted$}  {:<13} {}\n", b.bar, b.wanted, verdict, b.got)
        })
        .collect()
}

/// The value below which `share` of the sorted values lie; of none it is 0. With few values it is the largest.
pub fn percentile(sorted: &[f64], share: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    sorted[((sorted.len() as f64 * share) as usize).min(last)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_shows_its_figure_its_peer_and_the_ratio() {
        let mut report = Report::new("kvm_amd".into());
        report.beside("pause/stop/4096/p50", 250.0, "µs", "COLO", 50_000.0).note = Some("quick".into());
        let table = report.table("idle/");
        assert!(report.table("pause/").is_empty());
        for part in ["pause/stop/4096/p50", "250.0 µs", "COLO: 50000 µs", "0.01 of it", "[quick]"] {
            assert!(table.contains(part), "{part:?} is not in {table:?}");
        }
        let json = serde_json::to_value(&report.rows).unwrap();
        assert_eq!(json[0]["peer_or_limit"]["value"], 50_000.0);
        assert_eq!(json[0]["kvm_backend"], "kvm_amd");
    }

    #[test]
    fn percentiles_of_few_values_are_the_largest() {
        let values: Vec<f64> = (0..100).map(f64::from).collect();
        assert_eq!((percentile(&values, 0.5), percentile(&values, 0.999)), (50.0, 99.0));
        assert_eq!(percentile(&[], 0.5), 0.0);
    }
}
