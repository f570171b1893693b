//! What the operator's page says of the brakes and of the settings is what the code says.

use understudy_evacuation::core::brakes::BRAKES;

const PAGE: &str = include_str!("../../docs/evacuation.md");

#[test]
fn every_brake_is_in_the_page_as_it_is_in_the_code() {
    for brake in BRAKES {
        let passed = if brake.passable { "yes" } else { "no" };
        let row = format!("| `{}` | {} | {} | {passed} |", brake.name, brake.question, brake.unknown);
        assert!(PAGE.contains(&row), "{row}");
    }
    assert_eq!(PAGE.matches("| yes |\n").count() + PAGE.matches("| no |\n").count(), BRAKES.len());
}

#[test]
fn every_setting_is_in_the_page_with_its_default() {
    let rules = understudy_crm::controller::Rules::default();
    let seconds = |s: understudy_crm::policy::Seconds| {
        if s.0.is_multiple_of(60) { format!("{}min", s.0 / 60) } else { format!("{s}") }
    };
    for (name, default) in [
        ("batch", rules.batch.get_ref().to_string()),
        ("verify", seconds(rules.verify)),
        ("failures", rules.failures.get_ref().to_string()),
        ("attempts", rules.attempts.get_ref().to_string()),
        ("settle", seconds(rules.settle)),
        ("overdue", seconds(rules.overdue)),
        ("max_down", rules.max_down.get_ref().to_string()),
        ("load_step", rules.load_step.get_ref().to_string()),
        ("interval", seconds(rules.interval)),
    ] {
        assert!(PAGE.contains(&format!("| `{name}` | {default} |")), "{name} {default}");
    }
}
